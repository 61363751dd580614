/** Programs of both guests: they take who they are from a seed, and answer on their second serial port. */

/** What cloud-init does of it, for host name and keys. */
export const SEED = `#!/bin/sh
hostname "$(sed -n 's/^local-hostname: "\\(.*\\)"$/\\1/p' /mnt/meta-data)"
sed -n 's/^instance-id: "\\(.*\\)"$/\\1/p' /mnt/meta-data > /run/instance-id
mkdir -p -m 700 /root/.ssh
sed -n 's/^  - "\\(.*\\)"$/\\1/p' /mnt/meta-data > /root/.ssh/authorized_keys
`;

/** Answers on ttyS1; no program is started for an answer, so that it costs what a shell costs. */
export const ANSWER = `#!/bin/sh
exec 0<>/dev/ttyS1 1>&0
stty raw -echo
field() {
  case "$line" in *"\\"$1\\":\\""*) v=\${line#*\\"$1\\":\\"}; v=\${v%%\\"*} ;; *) v= ;; esac
}
nonce=
while read -r line; do
  field event
  case "$v" in
    suspend) field nonce; nonce=$v ;;
    resume) ;;
    fork)
      echo "$line" > /run/identity
      field name; hostname "$v"
      field macAddress
      for net in /sys/class/net/e*; do [ ! -d $net ] || ip link set dev \${net##*/} address "$v"; done ;;
    *) continue ;;
  esac
  field id
  echo "{\\"event\\":\\"here\\",\\"id\\":\\"$v\\",\\"nonce\\":\\"$nonce\\"}"
done
`;
