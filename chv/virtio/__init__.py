"""virtio devices (virtio 1.2) and the PCI transport that they sit on."""
