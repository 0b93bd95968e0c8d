#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Write a PersistentVolume and a claim that read a volume of another claim, in the same namespace or in any other:
#
#   ./share-claim.sh NAMESPACE/CLAIM NAMESPACE/NEW-CLAIM | kubectl apply -f -
#
# Nothing is copied: both claims use one volume, the new one read-only, for any number of pods and nodes. Requires the
# right to read PersistentVolumes, and to create them for the apply. The new PersistentVolume has Retain: deleting it
# deletes no data, and the volume cannot be deleted while it is read.
set -eu

end() { echo "share-claim.sh: $1" >&2; exit "$2"; }
usage="usage: share-claim.sh NAMESPACE/CLAIM NAMESPACE/NEW-CLAIM"

[ $# = 2 ] || end "$usage" 2
case $1 in ?*/?*) ;; *) end "$usage" 2 ;; esac
case $2 in ?*/?*) ;; *) end "$usage" 2 ;; esac
[ "$1" != "$2" ] || end "$1 cannot be shared under its own name; give another name" 2
namespace=${1%%/*} claim=${1#*/} new_namespace=${2%%/*} new_claim=${2#*/}

of() { kubectl get "$1" -o "jsonpath={$2}"; }

volume=$(kubectl -n "$namespace" get pvc "$claim" -o 'jsonpath={.spec.volumeName}')
[ -n "$volume" ] || end "claim $1 is not bound to a volume; wait until it is Bound" 1
[ -n "$(of "pv/$volume" .spec.csi.driver)" ] || end "volume $volume of claim $1 is no CSI volume" 1

# zone:name:uuid:readers. All readers share one handle, so that kubelet mounts the volume once on a node.
handle=$(of "pv/$volume" .spec.csi.volumeHandle)
case $handle in
*:*:*) ;;
*) end "the handle of $volume is $handle, expected zone:name:uuid (see static.yaml)" 1 ;;
esac
new_handle=$(printf %s "$handle" | cut -d : -f 1-3):readers

holder=$(kubectl get volumeattachments -o \
	"jsonpath={range .items[?(@.spec.source.persistentVolumeName==\"$volume\")]}{.spec.nodeName} {end}")
[ -z "$holder" ] || echo "share-claim.sh: $1 is still attached to ${holder% }: its readers wait until its pods are gone" >&2

# JSON is YAML. Everything of the volume stays as it is (filesystem, attributes, secrets), but for its handle.
csi=$(of "pv/$volume" .spec.csi | sed -e "s|\"volumeHandle\":\"[^\"]*\"|\"volumeHandle\":\"$new_handle\"|" \
	-e 's|"readOnly":true,\{0,1\}||' -e 's|^{|{"readOnly":true,|')
affinity=$(of "pv/$volume" .spec.nodeAffinity)
mode=$(of "pv/$volume" .spec.volumeMode)
size=$(of "pv/$volume" .spec.capacity.storage)

cat <<MANIFEST
apiVersion: v1
kind: PersistentVolume
metadata:
  name: $new_namespace-$new_claim
spec:
  capacity: {storage: $size}
  accessModes: [ReadOnlyMany]
  volumeMode: ${mode:-Filesystem}
  persistentVolumeReclaimPolicy: Retain
  storageClassName: ""
  claimRef: {namespace: $new_namespace, name: $new_claim}
  nodeAffinity: ${affinity:-null}
  csi: $csi
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: $new_claim
  namespace: $new_namespace
spec:
  storageClassName: ""
  volumeName: $new_namespace-$new_claim
  volumeMode: ${mode:-Filesystem}
  accessModes: [ReadOnlyMany]
  resources:
    requests:
      storage: $size
MANIFEST
