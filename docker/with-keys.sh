# sh with-keys.sh 'COMMAND ...': run it with those keys that docker-compose.yml was given.
# An empty file is no key there; to `ead` itself it is a mistake.
for name in api_key admin_api_key; do
  file=${SECRETS:-/run/secrets}/$name
  if [ -s "$file" ]; then
    export "EAD_$(echo "$name" | tr a-z A-Z)_FILE=$file"
  fi
done
eval "exec $1"
