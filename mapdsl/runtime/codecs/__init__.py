"""Storage formats: one module a family, on the tables and tiles that they share."""
