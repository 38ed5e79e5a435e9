"""The language that the rest of memplan speaks: programs, loops, plans, errors, options."""
