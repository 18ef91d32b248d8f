//! What is encoded is what a backup makes of it.
