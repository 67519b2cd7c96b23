"""Domains: whole systems of one field, assembled from the rooms."""
