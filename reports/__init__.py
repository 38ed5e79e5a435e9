"""What a plan says, for people: terminal, JSON, HTML, notebook."""
