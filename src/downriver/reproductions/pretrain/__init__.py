"""Reproductions of the papers behind ``downriver.pretrain``."""
