"""Nouns. Frozen values that every room may speak of; standard library only, no I/O, no clock."""
