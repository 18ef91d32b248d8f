#!/usr/bin/env bash
# The certificates of a pair: one authority, one certificate for each side.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"

usage() {
    cat <<TXT
usage: scripts/make-certificates.sh DIRECTORY NAME [NAME...]

Makes an authority and, of it, certificates for a backup that primaries reach as NAME (a host's name or
an IP address, as in destination_url) and for a primary, with openssl, good for 10 years. Writes to
DIRECTORY, which must not exist yet:

  ca-cert.pem                       both sides need it
  server-cert.pem, server-key.pem   the backup needs these
  client-cert.pem, client-key.pem   the primary needs these
  ca-key.pem                        makes further certificates: keep it away from both hosts
TXT
}

case "${1:-}" in
-h | --help)
    usage
    exit 0
    ;;
esac
[ $# -ge 2 ] || usage_error "A directory and a name are needed"
command -v openssl >/dev/null || need_packages openssl
directory=$1
shift
names=""
for name in "$@"; do
    case "$name" in
    *[!A-Za-z0-9.:-]*) die "'$name' is neither a host's name nor an IP address" ;;
    *:* | *[0-9].[0-9]*.[0-9]*.[0-9]*) names+=",IP:$name" ;;
    *) names+=",DNS:$name" ;;
    esac
done

umask 077
mkdir "$directory" || die "The directory must be new"
cd "$directory"
# make FILES ARGUMENT...: a key and a certificate.
make() {
    local files=$1 said
    shift
    said=$(openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
        -keyout "$files-key.pem" -out "$files-cert.pem" "$@" 2>&1) || die "openssl failed: $said"
}
leaf=(-CA ca-cert.pem -CAkey ca-key.pem -addext basicConstraints=critical,CA:FALSE)
make ca -subj "/CN=authority of a pair $(openssl rand -hex 4)" -addext keyUsage=critical,keyCertSign
make server -subj /CN=backup "${leaf[@]}" -addext extendedKeyUsage=serverAuth \
    -addext "subjectAltName=${names#,}"
make client -subj /CN=primary "${leaf[@]}" -addext extendedKeyUsage=clientAuth
echo "$directory: certificates for a primary, and for a backup at $*"
