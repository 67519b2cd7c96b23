"""Reproductions of the papers behind ``downriver.compress``."""
