"""Reproductions of the papers behind ``downriver.merge``."""
