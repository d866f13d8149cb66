"""How a new policy measures against the one before it, and the gate that decides."""
