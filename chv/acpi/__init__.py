"""ACPI: the AML encoder, the tables and the small devices that exist for ACPI alone."""
