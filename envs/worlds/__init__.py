"""Worlds in which the depth of computation that a step needs is known; importing this registers them.

Each reports it in info["difficulty"]. See docs/worlds.md. Entry points are strings, so that naming the worlds
imports neither them nor dm_control.
"""
