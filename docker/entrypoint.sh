#!/bin/sh
# Hands secrets, which are mounted as files, to programs that only read variables; then becomes the program.
set -eu
secrets=/run/secrets
if [ -r "$secrets/postgres_password" ]; then
  DAGSTER_PG_PASSWORD=$(cat "$secrets/postgres_password")
  export DAGSTER_PG_PASSWORD
fi
if [ -s "$secrets/api_key" ] && [ -r "$secrets/api_key" ]; then
  TASKAGENT_API_KEY=$(cat "$secrets/api_key")
  export TASKAGENT_API_KEY
fi
exec "$@"
