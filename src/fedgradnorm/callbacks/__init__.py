"""Callbacks: what is called while a run goes on. One a file."""
