"""The only room that knows ExaBGP's language."""
