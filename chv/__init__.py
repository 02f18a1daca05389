"""Run virtual machines on KVM from Python."""
