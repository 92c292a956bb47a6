"""What streams minimise."""
