"""The language: source, syntax, tree, diagnostics, formatter."""
