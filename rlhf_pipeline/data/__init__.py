"""From files and hub datasets to the token columns that TRL's trainers read: shapes, files, then encoded tables."""
