"""From the syntax tree to a checked map. No torch here."""
