"""Reproductions of the papers behind ``downriver.study``."""
