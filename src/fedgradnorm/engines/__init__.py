"""Engines: how the clients are run. One engine a file; each is loaded when it is used."""
