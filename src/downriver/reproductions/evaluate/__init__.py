"""Reproductions of the papers behind ``downriver.evaluate``."""
