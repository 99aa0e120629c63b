# Unpacks packages of another Debian release without installing them; to be sourced.

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# unpack_debian FOLDER "SUITE..." PACKAGE...
#
# Unpacks the packages, and all that they need, into FOLDER/root. The last suite is preferred. Nothing
# of the system is changed; apt has to be configured with a Debian mirror that has the suites.
unpack_debian() {
    local folder=$1 suites=$2 apt=$1/apt mirror suite package newest=
    shift 2
    rm -rf "$folder/root" "$apt"
    mkdir -p "$folder/root" "$apt"/{etc/apt.conf.d,etc/preferences.d,lists/partial,archives/partial}
    : >"$apt/status"
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -m 1 '/debian/*$' || true)
    if [ -z "$mirror" ]; then
        fail "apt is configured with no Debian mirror, or apt-get update was never run"
    fi
    for suite in $suites; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
        newest=$suite
    done >"$apt/etc/sources.list"
    _private_apt "$apt" update 2>"$apt/error" ||
        fail "$mirror has no list of $suites: $(tail -n 1 "$apt/error")"
    _private_apt "$apt" -t "$newest" install -y --no-install-recommends --download-only "$@" \
        >/dev/null 2>"$apt/error" ||
        fail "$mirror does not have $* in $suites: $(tail -n 1 "$apt/error")"
    for package in "$apt"/archives/*.deb; do
        dpkg -x "$package" "$folder/root"
    done
    rm -r "$apt"
}

# Calls apt-get with sources, lists and a list of installed packages of its own.
_private_apt() {
    local apt=$1
    shift
    apt-get -qq -o "Dir::Etc=$apt/etc" -o "Dir::State::lists=$apt/lists" \
        -o "Dir::State::status=$apt/status" -o "Dir::Cache::archives=$apt/archives" \
        -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=" \
        -o Acquire::Check-Valid-Until=false -o Acquire::Languages=none -o Acquire::Retries=3 \
        -o APT::Sandbox::User=root -o APT::Keep-Downloaded-Packages=true -o Debug::NoLocking=1 "$@"
}

# Prints the program loader of the packages in FOLDER/root, and the folders of their libraries.
loader_of() {
    find "$1/root" \( -name 'ld-linux-x86-64.so.2' -o -name 'ld-[0-9]*.so' \) -type f -print -quit
}
libraries_of() { echo "$1/root/usr/lib/x86_64-linux-gnu:$1/root/lib/x86_64-linux-gnu"; }
