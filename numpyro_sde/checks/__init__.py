"""What users hand over, looked at before it is used."""
