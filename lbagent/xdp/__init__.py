"""The only room that imports bcc and touches BPF maps."""
