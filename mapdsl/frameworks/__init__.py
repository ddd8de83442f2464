"""What training frameworks ask for, on top of compiled adapters; nothing here imports one but torch."""
