"""PCI: configuration space, the host bridge, BARs, MSI-X."""
