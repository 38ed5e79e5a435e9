"""Dynamo and AOTAutograd graphs become Programs here."""
