"""The programs that can turn weights into integers, behind one protocol, each in a process of its own."""
