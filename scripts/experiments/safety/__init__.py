"""What safety_table.py runs: small models that offloaders get wrong, and the offloaders."""
