"""Reproductions of the papers behind ``downriver.models``."""
