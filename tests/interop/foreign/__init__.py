"""Model servers not written here, installed from the package index, behind a real node (`scripts/foreign-models`)."""
