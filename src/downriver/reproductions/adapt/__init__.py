"""Reproductions of the papers behind ``downriver.adapt``."""
