"""Passes over programs, and the planner."""
