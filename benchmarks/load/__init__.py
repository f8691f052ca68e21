"""The front door under load: PostgreSQL with a million jobs, Valkey, and one API process."""
