"""Pure decisions: which variants may answer, which replica does. No I/O and no clock of their own."""
