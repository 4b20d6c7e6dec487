# sh with-keys.sh 'COMMAND ...': run it with those keys that docker-compose.yml was given.
# An empty file is no key there; to `ead` itself it is a mistake.
#
# Started as root, this reads the keys, which may be their owner's alone, and runs COMMAND as the
# image's user.
set -eu
user=${RUN_AS:-ead}
drop=
if [ "$(id -u)" = 0 ] && id "$user" >/dev/null 2>&1; then
  drop="setpriv --reuid=$user --regid=$(id -g "$user") --init-groups"
  own=$(mktemp -d)
  chown "$user" "$own"
  HOME=$(getent passwd "$user" | cut -d: -f6)
  export HOME
fi
for name in api_key admin_api_key; do
  file=${SECRETS:-/run/secrets}/$name
  if [ -s "$file" ]; then
    if [ -n "$drop" ]; then
      install -m 400 -o "$user" "$file" "$own/$name"
      file=$own/$name
    fi
    export "EAD_$(echo "$name" | tr a-z A-Z)_FILE=$file"
  fi
done
# COMMAND's words as a shell would see them, its variables' quotes included; nothing else of a shell
exec $drop python3 -c '
import os, shlex, sys
try:
    words = shlex.split(os.path.expandvars(sys.argv[1]))
except ValueError as error:
    sys.exit(f"with-keys.sh: {error}: {os.path.expandvars(sys.argv[1])}")
os.execvp(words[0], words)' "$1"
