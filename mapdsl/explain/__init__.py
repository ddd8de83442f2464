"""What `mapdsl explain` tells: where a tensor comes from and goes to, and what an error code means. No torch here."""
