"""From dataset rows to padded batches: templates, labels, images, collation."""
