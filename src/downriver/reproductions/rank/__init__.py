"""Reproductions of the papers behind the room ``rank``."""
