"""Mixtures of domains: the space they live in, what small runs say of them, and the one to train on."""
