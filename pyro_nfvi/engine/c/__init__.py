"""The C tier: a recorded graph becomes C code, built by the system's compiler."""
