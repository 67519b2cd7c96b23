"""Reproductions of the papers behind ``downriver.forecast``."""
