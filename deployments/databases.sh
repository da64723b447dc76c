#!/bin/sh
# Gives each of the two databases a role that owns it and reaches nothing else: `prefect` for the Prefect server, `labels`
# for the runs. Neither is a superuser. PostgreSQL's image runs this when it makes a new volume; for a volume of an earlier
# version, run it once by hand (docs/how-to/operations.md). It may run again: then it sets the passwords anew.
set -eu

psql --no-psqlrc --quiet --username "$POSTGRES_USER" --dbname postgres --set ON_ERROR_STOP=1 \
  --set prefect_password="$PREFECT_DATABASE_PASSWORD" --set labels_password="$LABELS_DATABASE_PASSWORD" <<'SQL'
SELECT 'CREATE ROLE ' || name FROM unnest(ARRAY['prefect', 'labels']) AS name
WHERE name NOT IN (SELECT rolname FROM pg_roles) \gexec
ALTER ROLE prefect LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD :'prefect_password';
ALTER ROLE labels LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD :'labels_password';
SELECT 'CREATE DATABASE ' || name FROM unnest(ARRAY['prefect', 'labels']) AS name
WHERE name NOT IN (SELECT datname FROM pg_database) \gexec
ALTER DATABASE prefect OWNER TO prefect;
ALTER DATABASE labels OWNER TO labels;
-- Else every role may connect to every database.
REVOKE ALL ON DATABASE prefect, labels, postgres, template1 FROM PUBLIC;
SQL

# What is in the databases of an earlier version belongs to the superuser.
for database in prefect labels; do
  psql --no-psqlrc --quiet --username "$POSTGRES_USER" --dbname "$database" --set ON_ERROR_STOP=1 \
    --set owner="$database" <<'SQL'
SELECT format('ALTER %s public.%I OWNER TO %I',
              CASE relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW'
              ELSE 'TABLE' END, relname, :'owner')
FROM pg_class AS found
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'S')
AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = found.oid AND deptype IN ('a', 'e', 'i')) \gexec
SELECT format('ALTER TYPE public.%I OWNER TO %I', typname, :'owner')
FROM pg_type AS found
WHERE typnamespace = 'public'::regnamespace AND typtype IN ('e', 'd')
AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = found.oid AND deptype = 'e') \gexec
SELECT format('ALTER ROUTINE %s OWNER TO %I', found.oid::regprocedure, :'owner')
FROM pg_proc AS found
WHERE pronamespace = 'public'::regnamespace
AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = found.oid AND deptype = 'e') \gexec
SQL
done
