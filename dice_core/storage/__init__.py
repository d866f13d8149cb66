"""Where files are kept, what they are called, and when they count: S3 and folders, layout, manifests, promotion."""
