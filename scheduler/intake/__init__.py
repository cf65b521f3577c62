"""Requests from other systems: who may ask for what, and what becomes of it."""
