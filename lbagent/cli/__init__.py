"""`lbagent` (daemon and offline verbs) and `lbctl` (talks to the running daemon)."""
