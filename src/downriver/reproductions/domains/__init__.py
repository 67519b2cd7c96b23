"""Papers whose room is ``domains``: whole systems of one field."""
