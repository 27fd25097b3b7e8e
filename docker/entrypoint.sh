#!/bin/sh
# Hands secrets, which are mounted as files, to programs that only read variables; then becomes the program.
set -eu
secret=/run/secrets/postgres_password
if [ -r "$secret" ]; then
  DAGSTER_PG_PASSWORD=$(cat "$secret")
  export DAGSTER_PG_PASSWORD
fi
exec "$@"
